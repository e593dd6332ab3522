"""Exit statuses of recipes and scripts."""

FINISHED = 0
FAILED = 1  # a bug, with a traceback
BAD_INPUT = 2  # one sentence that names the file or key at fault, and the remedy
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the run was cut short, and the same command continues it
