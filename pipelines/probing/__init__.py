"""Probes: is a property in the activations, and is that more than the probe itself could have learned?"""
