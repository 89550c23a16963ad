"""Small changes of meaning, drawn at random: do the tests that are for the changed code notice?"""
