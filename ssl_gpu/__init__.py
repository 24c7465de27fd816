"""Rooms, talkers and noise for training sound-source localisation, simulated on the GPU while it trains.

Importing this package does nothing: no device is touched, no file is read, no option is parsed.
"""

__version__ = "0.1.0"
