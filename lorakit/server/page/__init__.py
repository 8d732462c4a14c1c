"""The page at `/ui`: what a server does, and a place to ask it, in a browser.

It is a client of the public HTTP API and nothing else: whatever it shows or does, it asks the gateway for, with the
visitor's own key.
"""
