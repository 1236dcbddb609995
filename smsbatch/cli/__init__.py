"""The command line.

Lines are never shortened, because a shortened path is of no use. Text from a dataset (keys, messages) is printed
without control characters, which a terminal would execute.
"""
