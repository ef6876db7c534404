"""Interfaces of other libraries over `mla.decode`: to change over, change one import line.

Each module has the names, the defaults and the conventions of the library that it is named after.
"""
