"""Data sets built from model communities: DABench from Civitai records."""
