"""Tools of the tests and of `verify`: many ranks by forking, and counting what they send."""
