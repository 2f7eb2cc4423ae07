"""Captions from pixels: backends behind one interface, batched, cached, resumable."""
