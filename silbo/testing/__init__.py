"""For the tests of those who use silbo, or write an adapter for it."""
