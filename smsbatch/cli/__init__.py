"""The command line.

Lines are whole: a path that is cut is of no use. What comes from a dataset, a key or a message, is shown without its
control characters: a terminal would obey them.
"""
