"""Files that are whole or not there, and what they say of themselves.

durable.py     write a file, or part of one, so that a crash leaves the old one or the new one
appended.py    lines that are appended and never lost
rows.py        such lines by key: one finished piece of work each
documents.py   JSON documents with a format and a version; fields, read with clear errors
formats/       what is in those that one folder writes and another reads
"""
