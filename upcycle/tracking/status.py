"""How far a run came: the words of the entry `status` of run.json. Knows nothing else."""

RUNNING = "running"  # or killed, so that nobody wrote another word
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"
NOT_STARTED = "not started"  # what is said of a run without run.json
