"""Text generation, streamed: sequences join and leave one decoding batch at every step. Runs without Ray.

engine ......... the queue, the device thread, one loop: drop, admit, prefill, step, deliver
decoding ....... what the device does: a prompt's prefill, one step for all sequences
rectangle ...... keys and values of all sequences, aligned on the right, in one tensor a layer
budget ......... how many tokens' keys and values the answers under way may come to hold
sampling ....... the next token, by transformers' own processors, from each sequence's own random numbers
beams .......... beam search of one sequence, a step at a time
text ........... tokens to pieces of text; stop texts
whole .......... answers that `generate` makes: families that cannot be batched by steps
turns .......... a step each for threads that share the device
"""
