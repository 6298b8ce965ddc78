"""Which sample of which dataset stands at which position of a run, and what a run will see."""
