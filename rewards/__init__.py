"""(prompt, image) -> score. Ground floor: imports nothing of the other packages."""
