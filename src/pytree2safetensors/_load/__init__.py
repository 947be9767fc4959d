"""Files to trees."""
