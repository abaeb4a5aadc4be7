"""Texts other than the held-out split: choice of their documents, without those that training has read."""
