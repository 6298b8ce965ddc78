"""Devices, processes and the division of work over them; the only room that knows CPU from GPU."""
