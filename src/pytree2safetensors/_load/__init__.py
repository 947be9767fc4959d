"""Files and flat dicts to trees."""
