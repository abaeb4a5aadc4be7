"""Texts other than the held-out split: which documents of a corpus are scored, without those that training has
read.
"""
