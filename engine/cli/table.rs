//! Rows of text in columns: as wide as they need, the last one cut where the line ends.

/// On which side of a column its text stands.
#[derive(Clone, Copy, PartialEq)]
pub enum Side {
    Left,
    Right,
}

/// `rows` under `head`, two blanks between columns, each line ended. Longer lines than `width` are cut in their last column.
///
/// - `head`: names of the columns and the side of each; without names there is no line of them
pub fn table(head: &[(&str, Side)], rows: &[Vec<String>], width: usize) -> String {
    let named = head.iter().any(|(name, _)| !name.is_empty());
    let names: Vec<String> = head.iter().map(|(name, _)| name.to_string()).collect();
    let lines: Vec<&Vec<String>> = named.then_some(&names).into_iter().chain(rows).collect();
    let longest = |column: usize| lines.iter().map(|line| line.get(column).map_or(0, |cell| length(cell))).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(longest).collect();
    let mut text = String::new();
    for line in lines {
        let mut out = String::new();
        for (column, cell) in line.iter().enumerate() {
            let is_last = column + 1 == head.len();
            let cell = if is_last { shortened(cell, width.saturating_sub(length(&out)).max(8)) } else { cell.clone() };
            let blanks = " ".repeat(widths[column].saturating_sub(length(&cell)));
            match head[column].1 {
                Side::Left => out.extend([cell, blanks]),
                Side::Right => out.extend([blanks, cell]),
            }
            out.push_str("  ");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

/// `text` on one line of at most `width` characters; a cut one ends in `...`.
pub fn shortened(text: &str, width: usize) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if length(&line) <= width {
        return line;
    }
    let kept: String = line.chars().take(width.saturating_sub(3)).collect();
    format!("{kept}...")
}

fn length(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|cell| cell.to_string()).collect()
    }

    #[test]
    fn columns_are_as_wide_as_they_need_and_lines_end_where_they_must() {
        let head = [("run", Side::Left), ("loss", Side::Right), ("words", Side::Left)];
        let rows = [row(&["a", "1.25", "é --text x"]), row(&["longer", "3", "one two three four five\nsix"])];
        let wanted = "run     loss  words\na       1.25  é --text x\nlonger     3  one two three...\n";
        assert_eq!(table(&head, &rows, 30), wanted);
        let bare = [("", Side::Left), ("", Side::Left)];
        assert_eq!(table(&bare, &[row(&["a", "b"]), row(&["ccc", ""])], 80), "a    b\nccc\n");
        assert_eq!(table(&head, &[], 80), "run  loss  words\n");
    }
}
