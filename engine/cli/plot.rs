//! A series of numbers as a drawing of characters. Every column shows the lowest and the highest value that falls into it, so
//! that one spike in thousands of points is seen; values that are not finite are marked below.

use crate::host::progress::short;

/// How dots are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Two by four dots a character. Source: Unicode, block Braille Patterns.
    Braille,
    Ascii,
}

impl Style {
    /// Dots a character has across and down.
    fn dots(self) -> (usize, usize) {
        match self {
            Self::Braille => (2, 4),
            Self::Ascii => (1, 1),
        }
    }

    fn character(self, dots: u8) -> char {
        match self {
            Self::Braille => char::from_u32(0x2800 + u32::from(dots)).expect("the block has 256 characters"),
            Self::Ascii if dots > 0 => '*',
            Self::Ascii => ' ',
        }
    }
}

/// Characters that the drawing itself is high.
const ROWS: usize = 10;
/// Characters of the labels on the left, at least.
const LABEL: usize = 7;

/// Draws `points` under `title`, in lines of at most `width` characters.
///
/// - `points`: step and value, in the order in which they were logged
pub fn plot(title: &str, points: &[(u64, f64)], width: usize, style: Style) -> String {
    let finite: Vec<(u64, f64)> = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return format!("{title}: no values\n") };
    let (steps, values) = ((first.0, last.0.max(first.0)), bounds(&finite));
    let labels = labels(values);
    let margin = labels.iter().map(String::len).max().unwrap_or(0).max(LABEL);
    let columns = width.saturating_sub(margin + 2).max(8);
    let across = columns * style.dots().0;
    let spans = spans(&finite, steps, across);
    let grid = grid(&spans, values, columns, style);

    let mut text = format!("{title}  last {}", short(last.1));
    if let Some((low, high)) = finite.iter().map(|point| point.1).fold(None, widen) {
        text += &format!(", lowest {}, highest {}", short(low), short(high));
    }
    let others: Vec<&(u64, f64)> = points.iter().filter(|(_, value)| !value.is_finite()).collect();
    if let Some(first) = others.first() {
        text += &format!(", {} not finite, the first at step {}", others.len(), first.0);
    }
    text.push('\n');
    let axis = if style == Style::Ascii { ['|', '+', '-', 'x'] } else { ['│', '└', '─', '×'] };
    for (row, line) in grid.iter().enumerate() {
        let label = match row {
            0 => labels[0].as_str(),
            row if row == ROWS / 2 => labels[1].as_str(),
            row if row == ROWS - 1 => labels[2].as_str(),
            _ => "",
        };
        let line: String = line.iter().map(|dots| style.character(*dots)).collect();
        text += &format!("{label:>margin$} {}{}", axis[0], line.trim_end_matches([' ', '\u{2800}']));
        text.push('\n');
    }
    let mut floor = vec![axis[2]; columns];
    for (step, _) in &others {
        floor[place(*step, steps, across) / style.dots().0] = axis[3];
    }
    text += &format!("{:>margin$} {}{}\n", "", axis[1], floor.into_iter().collect::<String>());
    let (left, right) = (steps.0.to_string(), steps.1.to_string());
    let gap = columns.saturating_sub(left.len()).max(right.len() + 1);
    text += &format!("{:>margin$}  {left}{right:>gap$}\n", "");
    text
}

fn widen(range: Option<(f64, f64)>, value: f64) -> Option<(f64, f64)> {
    Some(range.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
}

/// The range that the drawing shows: that of the values, or a little around them if they are all one.
fn bounds(points: &[(u64, f64)]) -> (f64, f64) {
    match points.iter().map(|point| point.1).fold(None, widen) {
        None => (0.0, 1.0),
        Some((low, high)) if low == high => {
            let room = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            (low - room, high + room)
        }
        Some(range) => range,
    }
}

/// The values at the top, in the middle and at the bottom. Values close to each other get the digits that tell them apart.
fn labels((low, high): (f64, f64)) -> [String; 3] {
    let values = [high, low / 2.0 + high / 2.0, low];
    let texts = values.map(short);
    if texts[0] != texts[1] && texts[1] != texts[2] { texts } else { values.map(|value| format!("{value:.6e}")) }
}

/// Which of `across` columns a step falls into.
fn place(step: u64, (first, last): (u64, u64), across: usize) -> usize {
    let (done, all) = (u128::from(step.saturating_sub(first)), u128::from(last - first).max(1));
    ((done * across as u128 / (all + 1)) as usize).min(across - 1)
}

/// The lowest and the highest value of each column of dots. Columns between two points lie on the line between them.
fn spans(points: &[(u64, f64)], steps: (u64, u64), across: usize) -> Vec<Option<(f64, f64)>> {
    let mut spans = vec![None; across];
    for (step, value) in points {
        let span = &mut spans[place(*step, steps, across)];
        *span = widen(*span, *value);
    }
    // Where there are more columns than points, the last value of one and the first of the next are joined.
    for pair in points.windows(2) {
        let (from, to) = (place(pair[0].0, steps, across), place(pair[1].0, steps, across));
        for (column, span) in spans.iter_mut().enumerate().take(to).skip(from + 1) {
            let share = (column - from) as f64 / (to - from) as f64;
            *span = widen(*span, pair[0].1 * (1.0 - share) + pair[1].1 * share);
        }
    }
    spans
}

/// The dots of each character, by row from the top. Neighbouring columns touch, so that the line has no holes.
fn grid(spans: &[Option<(f64, f64)>], (low, high): (f64, f64), columns: usize, style: Style) -> Vec<Vec<u8>> {
    // The bit of each dot of a Braille character, by row, left and right.
    const BITS: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
    let (wide, tall) = style.dots();
    let height = ROWS * tall;
    // Halved first, so that the whole range of f64 has a finite width.
    let share = |value: f64| (value / 2.0 - low / 2.0) / (high / 2.0 - low / 2.0);
    let row = |value: f64| height - 1 - ((share(value) * height as f64) as usize).min(height - 1);
    let mut grid = vec![vec![0u8; columns]; ROWS];
    let mut before: Option<(usize, usize)> = None;
    for (column, span) in spans.iter().enumerate() {
        let Some((lowest, highest)) = span else {
            before = None;
            continue;
        };
        let own = (row(*highest), row(*lowest));
        let (mut top, mut bottom) = own;
        if let Some((above, below)) = before {
            // Joined to the column on the left, if there is a gap.
            if above > bottom {
                bottom = above - 1;
            } else if below < top {
                top = below + 1;
            }
        }
        for dot in top..=bottom {
            grid[dot / tall][column / wide] |= BITS[dot % tall][column % wide];
        }
        before = Some(own);
    }
    grid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[f64]) -> Vec<(u64, f64)> {
        values.iter().enumerate().map(|(step, value)| (step as u64, *value)).collect()
    }

    /// The rows of the drawing, without labels.
    fn rows(text: &str, axis: char) -> Vec<String> {
        text.lines().filter_map(|line| Some(line.split_once(axis)?.1.to_string())).collect()
    }

    #[test]
    fn a_straight_line_is_one_in_ascii() {
        let text = plot("loss", &points(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]), 19, Style::Ascii);
        let drawn = rows(&text, '|');
        assert_eq!(drawn.len(), ROWS);
        for (row, line) in drawn.iter().enumerate() {
            assert_eq!(line.trim_end(), format!("{}*", " ".repeat(9 - row)), "{text}");
        }
        assert!(text.starts_with("loss  last 9.0000, lowest 0, highest 9.0000\n"), "{text}");
        assert!(text.lines().nth(1).unwrap().trim_start().starts_with("9.0000 |"), "{text}");
        assert!(text.ends_with(" 0        9\n") && text.is_ascii(), "{text}");
    }

    #[test]
    fn one_spike_in_ten_thousand_points_is_seen() {
        for style in [Style::Ascii, Style::Braille] {
            for at in [0usize, 4_321, 9_999] {
                let mut values = vec![1.0; 10_000];
                values[at] = 50.0;
                let text = plot("loss", &points(&values), 80, style);
                let axis = if style == Style::Ascii { '|' } else { '│' };
                let top = &rows(&text, axis)[0];
                let column = top.chars().position(|c| c != ' ' && c != '\u{2800}').unwrap();
                let wanted = at * (80 - LABEL - 2) / 10_000;
                assert!(column.abs_diff(wanted) <= 1, "column {column} for the spike at {at}\n{text}");
                assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
            }
        }
    }

    #[test]
    fn every_column_between_the_first_and_the_last_point_is_drawn() {
        // Few points far apart, and jumps between neighbours.
        let text = plot("x", &[(0, 1.0), (50, 3.0), (60, -2.0), (100, 2.0)], 60, Style::Ascii);
        let drawn = rows(&text, '|');
        for column in 0..60 - LABEL - 2 {
            assert!(drawn.iter().any(|line| line.chars().nth(column) == Some('*')), "column {column}\n{text}");
        }
    }

    #[test]
    fn what_is_not_finite_is_counted_and_marked_below() {
        let mut values = vec![2.0; 40];
        (values[20], values[30]) = (f64::NAN, f64::INFINITY);
        let text = plot("loss", &points(&values), 49, Style::Ascii);
        assert!(text.contains("2 not finite, the first at step 20"), "{text}");
        let floor = text.lines().find(|line| line.contains('+')).unwrap().split_once('+').unwrap().1;
        assert_eq!((floor.find('x'), floor.matches('x').count()), (Some(20), 2), "{text}");
        let only = plot("loss", &[(3, f64::NAN), (4, f64::NEG_INFINITY)], 60, Style::Braille);
        assert!(only.contains("last -inf, 2 not finite"), "{only}");
        assert_eq!(plot("loss", &[], 60, Style::Ascii), "loss: no values\n");
    }

    #[test]
    fn extreme_and_equal_values_are_drawn() {
        for values in [vec![3.0], vec![0.0, 0.0], vec![-f64::MAX, f64::MAX], vec![1e-300, 2e-300], vec![1.0, 1.0 + 1e-12]] {
            for (width, style) in [(1, Style::Ascii), (60, Style::Braille)] {
                let text = plot("x", &points(&values), width, style);
                assert!(!text.contains("NaN") && !text.contains("inf,"), "{text}");
                assert!(rows(&text, if style == Style::Ascii { '|' } else { '│' }).iter().any(|row| !row.is_empty()), "{text}");
            }
        }
        // Steps need not begin at 0, and may be large.
        let late = plot("x", &[(u64::MAX - 1, 1.0), (u64::MAX, 2.0)], 60, Style::Ascii);
        assert!(late.contains("18446744073709551614"), "{late}");
    }
}
