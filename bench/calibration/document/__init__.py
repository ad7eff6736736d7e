"""docs/hardware.md, made of the records in bench/results alone.

results     what the records say of each GPU: the latest run, the one before, the peers
findings    what follows from them for the author of a kernel
plots       the same as pictures
page        the document
"""
