//! The wire format of protobuf: fields one after the other, each with its number.

/// The value of a field.
#[derive(Debug, PartialEq)]
pub(super) enum Wire<'a> {
    /// A number of any width, booleans and enumerations too.
    Number(u64),
    /// Four bytes.
    Fixed(u32),
    /// Eight bytes; no field that is read has them.
    Wide,
    /// A text, bytes, or a message.
    Bytes(&'a [u8]),
}

/// The fields of a message.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Fields { rest: bytes }
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        match usize::try_from(count)
            .ok()
            .and_then(|count| self.rest.split_at_checked(count))
        {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => Err(format!(
                "a field of {count} bytes does not fit the {} that follow",
                self.rest.len()
            )),
        }
    }

    /// Seven bits a byte, the lowest first; ten bytes at most.
    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0;
        for place in 0..10 {
            let byte = u64::from(self.take(1)?[0]);
            number |= (byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err("a number has more than ten bytes".to_string())
    }

    fn field(&mut self) -> Result<(u64, Wire<'a>), String> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Wire::Number(self.number()?),
            1 => {
                self.take(8)?;
                Wire::Wide
            }
            2 => {
                let count = self.number()?;
                Wire::Bytes(self.take(count)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Wire::Fixed(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            kind => {
                return Err(format!(
                    "a field of wire type {kind}, which no such file has"
                ));
            }
        };
        Ok((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}
