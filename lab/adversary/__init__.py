"""Guests, agents and a host that misbehave around one disk, and what became of it.

`figures`: what is counted. `applications`: what guests run. `agents`: guests that do not obey. `host`: what the host
itself does to its pool. `fairness`: who had less than a fair share. `run`: one run.
"""
