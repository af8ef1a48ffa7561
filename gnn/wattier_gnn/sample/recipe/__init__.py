"""How the sample corpus was made: geometries, labels by real physics, the five released layouts.

Run ``python -m wattier_gnn.sample.recipe --help`` with the extra ``[labels]`` installed. Labelling takes
about an hour on two cores; the result is stored in the repository and never recomputed by a test.
"""
