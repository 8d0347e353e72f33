"""The backbone as stages: exported, cut behind each exit, kept right for the inputs and the weights of each call."""
