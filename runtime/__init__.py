"""What every Tandem process needs: configuration, logging, metrics, processes, channels, errors. No torch here."""
