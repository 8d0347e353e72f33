"""Measuring how long something takes, and on what host.

Whatever is compared runs interleaved: in each round (:mod:`cet.measure.rounds`) everything takes one turn, in random
order, timed in the way that is right for its device (:mod:`cet.measure.timers`); figures with their spread or interval
follow from the rounds (:mod:`cet.measure.statistics`).
"""
