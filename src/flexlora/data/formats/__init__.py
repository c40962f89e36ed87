"""Formats of files, one each: the names of a file's columns, and the columns themselves."""
