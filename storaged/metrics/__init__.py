"""Prometheus metrics of the guest: the contract, what fills it at scrape time, who serves it."""
