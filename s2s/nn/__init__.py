"""The model: cells, recurrence, attention, encoder, bridge, decoder, and their sum."""
