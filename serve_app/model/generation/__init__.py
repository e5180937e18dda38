"""Text generation, streamed: sequences join and leave one decoding batch at every step. Runs without Ray.

engine ......... the queue, the device thread, one loop: drop, admit, prefill, step, deliver
decoding ....... what the device does: a prompt's prefill, one step for all sequences
rectangle ...... keys and values of all sequences, aligned on the right, in one tensor a layer
sampling ....... the next token, by transformers' own processors, from each sequence's own random numbers
text ........... tokens to pieces of text; stop texts
whole .......... answers that `generate` makes: beams, and families that cannot be batched by steps
turns .......... a step each for threads that share the device
"""
