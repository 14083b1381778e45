"""The only room that knows DTensor and process groups."""
