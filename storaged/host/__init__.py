"""The host's side: one disk, many guests. Never imported by the guest's daemon.

The door to who may have how much: `shares.step` and `shares.next_wakeup`; `events` for what goes in and comes out;
`model.State`, `model.books` and `model.established` to look at; `settings.Sharing`. The rest of these modules
(`decide`, `demand`, `leases`, `levels`) is behind it. Around this core: `watch` reads a pool, `guests` calls an
agent, `controller` runs one pool, `listener` hears who has started, `service` is the daemon.
"""
