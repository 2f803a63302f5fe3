"""Looking inside: what fine-tuning did to which neurons, and whether it matters.

Every analysis returns plain arrays or a ``Table``; drawing and publishing are the report's business.
"""
