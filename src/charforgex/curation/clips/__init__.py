"""Videos to clips of one length: a kind of curation of its own, `charforgex curate clips`. `run.py` has the stages in order."""
