"""Scripts that train every weight of the pocket world from nothing: `python -m pocket.train --help`."""
