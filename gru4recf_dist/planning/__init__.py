"""What a run would need before it is started: memory, bytes on the wire and time, from expected counts."""
