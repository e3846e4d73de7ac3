"""Other frameworks: methods in Lightning and timm, scikit-learn's interface, MAITE's protocols.

One file a framework, imported by its name (``from cure.integrations.lightning import
RobustModule``); a missing package is named in one sentence then, and not before.
"""
