"""Calling T2I APIs: what a call is, what can be called, how a policy proposes calls."""
