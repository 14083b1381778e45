"""Modules written as for one device. They know no mesh."""
