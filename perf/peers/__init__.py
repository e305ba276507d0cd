"""Other engines, measured beside Millrace in the same run; each in a process of its own."""
