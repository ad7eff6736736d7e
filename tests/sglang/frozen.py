"""Imported last in a process that others are forked from: no collection of theirs goes through, and so copies, what they have in common."""

import gc

gc.freeze()
