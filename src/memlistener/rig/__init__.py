"""What the commands that run a guest have in common: its machine, and the console.

=======  ======================================================================
listing  machine code as it stands in a source file
machine  vCPUs on KVM, or scripts on a fake kernel in their place
display  a bar in a terminal, lines elsewhere
table    figures for people
command  options, falling back to the fake kernel, Ctrl-C, printing the outcome
=======  ======================================================================
"""
