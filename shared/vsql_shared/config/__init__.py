"""The one configuration file: typed settings, where it is found, what is refused."""
