"""What says, from the reports of a run, that training goes wrong, and what to do then."""
