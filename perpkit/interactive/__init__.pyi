from . import exercises as exercises
