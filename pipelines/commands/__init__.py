"""The verbs of the command line, one file each. Their modules import nothing heavy; the work does, when it starts."""
