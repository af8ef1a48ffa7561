"""A campaign that never happened, whose truth is known: 3 stages, 12 trials, 16 GPUs of two hosts, one of them lost.

world    what happens when, and the closed forms of what it costs
machines the power sources of the two hosts, replayed from traces, and the GPU that stops answering
player   runs the exporters, and registers trials and the campaign as a driver and its trials would
"""
