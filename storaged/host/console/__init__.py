"""The web console: what the host's own service (`storaged.host.v1`) says, as a page that stays true."""
