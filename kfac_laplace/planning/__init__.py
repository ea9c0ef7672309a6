"""What a fit will take, before it is made: passes, operations, bytes and seconds."""
