"""Section 3 and appendix A of the paper: automatic interpretability.

A feature is explained from fragments of text in which it is most active, its activations on other fragments are simulated
from the explanation alone, and the score is the correlation of the two. Beside it are detection and fuzzing, which ask
whether the explanation tells fragments and tokens of the feature from others.
"""
