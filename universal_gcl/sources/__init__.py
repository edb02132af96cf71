"""Readers of data: captioned images and rows, from folders, tables and the Hub."""
